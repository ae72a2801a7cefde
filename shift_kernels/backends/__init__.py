"""What can run a looped block, one backend a module."""
