"""The agent on every VM: installs, runs the job, mirrors, and ends the VM. Standard library only, Python 3.10 or later."""
