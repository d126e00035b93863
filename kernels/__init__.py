"""Plain references of the operations that dominate memory traffic, one file each."""
