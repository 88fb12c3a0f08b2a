"""What a trained network did: plots and measurements that read models and run folders."""
