"""The setup and transforms that participants in Keras and TF-slim share."""
