"""The data of the small apps: scikit-learn's digits, dealt out to the participants."""

from sklearn.datasets import load_digits


def part(partition_id, num_partitions, dtype="float32"):
    """Return x_train, y_train, x_test, y_test of one participant."""
    images, labels = load_digits(return_X_y=True)
    images = (images[partition_id::num_partitions] / 16).astype(dtype)
    labels = labels[partition_id::num_partitions]
    return images[60:], labels[60:], images[:60], labels[:60]
