"""What leaves by the operators' door: downloads, pages of lists, streams of events, dry runs."""
