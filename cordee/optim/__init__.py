"""What happens to gradients that ranks agree on (`clip`, `optimizer`, `muon`), and the search for a
learning rate (`lr_search`)."""
