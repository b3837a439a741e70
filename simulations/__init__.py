"""ServerApps, run configurations, the study and the demo."""
