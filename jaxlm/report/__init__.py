"""Reports of runs."""

# What a run folder has of one.
REPORT = "report.html"
PICTURE = "loss.png"
