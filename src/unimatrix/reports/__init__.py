"""Tables made from records, so that no figure in a document is typed."""
