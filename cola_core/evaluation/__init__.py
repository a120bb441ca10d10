"""What a chain is worth: answers, scores with intervals, figures, report and model card."""
