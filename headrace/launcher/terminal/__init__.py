"""How a run is shown in a terminal: the launcher's progress view, and control's answers as text and tables."""
