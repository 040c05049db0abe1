"""Making a trained model smaller and faster inside an accuracy bound, keeping only what measurably helps."""
