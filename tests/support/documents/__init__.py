"""What the tests of the documents are written with: their blocks, the runs of these, links and anchors."""
