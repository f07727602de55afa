"""What an output directory says about itself: model card, report as JSON and HTML, lock file."""
