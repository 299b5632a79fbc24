"""What training minimises: a named sum over terms and prefixes."""
