"""The commands of `cosmic`, one file each; nothing heavy is imported before a command runs."""
