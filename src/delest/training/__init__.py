"""The training loop over a session, evaluation, schedules, stopping, checkpoints, progress."""
