"""`fastdpo study`: the three questions of arXiv 2407.13709, asked of one's own model and data. See docs/study.md."""
