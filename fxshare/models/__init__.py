"""What is known of models as such: their kind, their structure, traits of their configuration."""
