"""What the notebooks need: parameters, live widgets, pictures, pages."""
