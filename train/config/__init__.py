"""Settings: the keys, their bounds, how recipe and command line are composed."""
