"""Models of Hugging Face and Keras inside Cordée, and their weights' formats."""
