"""The agent on every VM: installs, runs, mirrors, ends the VM. Standard library only, Python 3.10 or later."""
