"""Measuring a model on images it was not trained on."""
