"""What is laid into the sandbox: on the standard library only, and alone there, without the rest of the package."""
