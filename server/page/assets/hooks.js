import { html } from "./html.js";

export function Hooks() {
  return html``;
}
