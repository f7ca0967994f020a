"""What two runs' summaries have to agree on."""


def means(summary):
    """The measures of a summary: all that is a mean over trials."""
    return {name: summary[name] for name in summary["intervals"]}
