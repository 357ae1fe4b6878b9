import { html } from "./html.js";

export function Policy() {
  return html``;
}
