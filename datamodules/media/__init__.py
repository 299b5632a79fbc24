"""One kind of media each: bytes to pixels or samples, within limits that no file passes."""
