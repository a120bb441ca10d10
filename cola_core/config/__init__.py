"""What params.yaml may say, section by section; importing it loads no torch."""
