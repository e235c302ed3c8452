"""The commands besides `train`: evaluate, predict, export, report, sheet, config, doctor."""

__all__ = ["config", "doctor", "evaluate", "export", "predict", "report", "sheet"]
