"""The site: records as pages, for a browser without a network."""
