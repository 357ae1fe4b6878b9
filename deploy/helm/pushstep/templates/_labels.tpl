{{/* What chooses this release's Pod, and is on everything of it. */}}
{{- define "pushstep.labels" -}}
app.kubernetes.io/name: pushstep
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
