"""Who holds the experts' weights of a layer, in which format, and where logical experts and slots meet."""
