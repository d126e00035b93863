"""From a trained model to a bundle of engines that are proved to be that model."""
