"""What the chapters share: data, models, plots, and claims that are checked. Nothing else needs it."""
