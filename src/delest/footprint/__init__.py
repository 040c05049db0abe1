"""What training takes: so far by probing real steps in a process of its own."""
