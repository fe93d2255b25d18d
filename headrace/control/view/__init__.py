"""The view of the run that every reader gets, refreshed twice a second, and the event stream to the open pages."""
