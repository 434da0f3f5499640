"""Where data sets come from: archives, folders of images, NumPy's files, the files of MNIST. All are read with distrust."""
