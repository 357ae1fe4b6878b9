"""Files that are written and read in slices, at a pace that leaves the machine to others."""
