"""Pictures: how a row names one, where its bytes come from, and how they become RGB."""
