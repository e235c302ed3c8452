"""The output of a training while it runs, and the pages that are made from it afterwards."""

__all__ = ["csv_cells", "finished_run", "output", "reporter", "run_metrics", "run_page", "step_profile", "trackers"]
