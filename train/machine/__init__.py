"""What this machine has: environment, devices, memory, disk."""
