"""Training in Keras: Keras 2 as `tf_keras`, Keras 3 on the backend that it is set to."""
