"""What is saved, kept, compared and loaded; the hand-over between the stages."""
