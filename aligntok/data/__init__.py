"""Images in: folders, WebDataset tars, the embedded set; frozen outputs kept in memory."""
