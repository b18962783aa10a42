"""Launch, help, command line, ranks."""
