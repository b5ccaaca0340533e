"""What an answer rests on, in the picture's own pixels: relevance, and how faithful it is."""
