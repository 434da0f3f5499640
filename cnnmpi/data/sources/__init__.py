"""Where data sets come from: archives, folders of images, NumPy's files, MNIST. All are read with distrust."""
