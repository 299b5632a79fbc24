"""Large language models behind one interface: what they are asked, and what they answer."""
