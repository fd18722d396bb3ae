never imported
