"""What Keras on TensorFlow and TF-slim share."""
