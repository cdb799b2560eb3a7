"""What is reconstructed; one file each."""
